"""Record a generation: where each new token looks, and how widely. Save the recording and open it again."""

import tempfile
from pathlib import Path

import torch

import regard

torch.manual_seed(0)
model, tokenizer = regard.load("reader")
inputs = tokenizer("It was a dark night, and the old man", return_tensors="pt")

with regard.record(model, "entropy", "mass", processor=tokenizer) as recording:
    model.generate(**inputs, max_new_tokens=12, do_sample=False)

with tempfile.TemporaryDirectory() as folder:
    path = recording.save(Path(folder) / "run.zarr")
    node = regard.open(path).tree["language_model"].to_dataset()

node = node.isel(batch=0)
entropy = node["entropy"].mean(("layer", "head"))
mass = node["mass"].mean(("layer", "head"))
print("position  token         entropy  " + "  ".join(f"on {role}" for role in mass["role"].values))
for at in node["query"].values[node["query_role"].values == "generated"]:
    token = str(node["query_token"].sel(query=at).values)
    shares = "  ".join(f"{float(mass.sel(query=at, role=r)):{len(r) + 3}.0%}" for r in mass["role"].values)
    print(f"{at:8d}  {token!r:12s}  {float(entropy.sel(query=at)):7.2f}  {shares}")
