// The doors that Python knocks at: choice of instruction set, threads, errors.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <dlfcn.h>
#endif

#if defined(_WIN32)
#define REGARD_PUBLIC extern "C" __declspec(dllexport)
#else
#define REGARD_PUBLIC extern "C" __attribute__((visibility("default")))
#endif

namespace {

enum { BASELINE = 0, AVX2 = 1, AVX512 = 2 };

int64_t best_instructions() {
#if defined(REGARD_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return AVX2;
#endif
  return BASELINE;
}

// The best, or as REGARD_INSTRUCTIONS lowers it; -1 where that names none.
int64_t chosen_instructions() {
  const char* asked = std::getenv("REGARD_INSTRUCTIONS");
  if (!asked) return best_instructions();
  const char* names[] = {"baseline", "avx2", "avx512"};
  for (int64_t i = 0; i < 3; i++)
    if (!std::strcmp(asked, names[i])) return std::min(i, best_instructions());
  return -1;
}

struct Work {
  Job job;
  void* data;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
};

void work(void* pointer) {
  Work& w = *static_cast<Work*>(pointer);
  for (int64_t i; !w.failed && (i = w.next++) < w.count;) {
    try {
      w.job(w.data, i);
    } catch (...) {
      if (!w.failed.exchange(true)) w.error = std::current_exception();
    }
  }
}

// PyTorch's own OpenMP threads where the process has them: a second pool would fight them for the same cores.
using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
Fork openmp() {
#if defined(__linux__)
  static const Fork fork = reinterpret_cast<Fork>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return fork;
#else
  return nullptr;
#endif
}

#if defined(REGARD_X86)
#define REGARD_BUILDS(pass) {baseline::pass, avx2::pass, avx512::pass}
#else
#define REGARD_BUILDS(pass) {baseline::pass}
#endif

// Runs the build for the best instructions that the machine has and the call allows; 0, or what went wrong.
template <class A, class T, size_t N>
int64_t run_best(void (*const (&builds)[N])(const A&, const T&), const A& a, const T& other) {
  const int64_t chosen = chosen_instructions();
  if (chosen < 0) return 3;
  try {
    builds[chosen](a, other);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  } catch (...) {
    return 2;
  }
}

}  // namespace

void run_jobs(Job job, void* data, int64_t count, int64_t threads) {
  Work w{job, data, count};
  threads = std::min(threads, count);
  if (threads <= 1) {
    work(&w);
  } else if (const Fork fork = openmp()) {
    fork(work, &w, unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads; i++) others.emplace_back(work, &w);
    work(&w);
    for (auto& t : others) t.join();
  }
  if (w.failed) std::rethrow_exception(w.error);
}

REGARD_PUBLIC int64_t regard_instructions() { return chosen_instructions(); }
REGARD_PUBLIC int64_t regard_openmp() { return openmp() != nullptr; }
REGARD_PUBLIC int64_t regard_sizes(int64_t which) {
  const size_t sizes[] = {sizeof(Attention), sizeof(Results), sizeof(Gradients), sizeof(Grid), sizeof(GridRows)};
  return int64_t(sizes[which]);
}

REGARD_PUBLIC int64_t regard_forward(const Attention* a, const Results* r) {
  return run_best(REGARD_BUILDS(forward), *a, *r);
}

REGARD_PUBLIC int64_t regard_backward(const Attention* a, const Gradients* g) {
  return run_best(REGARD_BUILDS(backward), *a, *g);
}

REGARD_PUBLIC int64_t regard_grid_forward(const Grid* g, const GridRows* r) {
  return run_best(REGARD_BUILDS(grid_forward), *g, *r);
}

REGARD_PUBLIC int64_t regard_grid_backward(const Grid* g, const GridRows* r) {
  return run_best(REGARD_BUILDS(grid_backward), *g, *r);
}
