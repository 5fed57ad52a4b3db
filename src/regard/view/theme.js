// Light or dark: as the system wants, until the button says otherwise; light on paper.

import { setTheme } from "./colour.js";

export function themed(button, redraw) {
  const dark = matchMedia("(prefers-color-scheme: dark)"), print = matchMedia("print"), root = document.documentElement;
  let wanted = null;
  const apply = () => {
    const name = print.matches ? "light" : wanted ?? (dark.matches ? "dark" : "light");
    root.dataset.theme = name;
    setTheme(name);
    button.textContent = name === "dark" ? "Light" : "Dark";
  };
  const retheme = () => { apply(); redraw(); };
  button.addEventListener("click", () => {
    wanted = root.dataset.theme === "dark" ? "light" : "dark";
    retheme();
  });
  dark.addEventListener("change", retheme);
  print.addEventListener("change", retheme);
  apply();
}
