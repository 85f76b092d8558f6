"use strict";
// The colours: as the system says, or as the button says for as long as the tab lives.
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  root.classList.add("js");

  // A page from a file, or in a sandboxed frame, may have no storage: then the choice is the page's.
  function stored(value) {
    try {
      if (value) sessionStorage.setItem("dynmask-theme", value);
      return sessionStorage.getItem("dynmask-theme");
    } catch {
      return null;
    }
  }

  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
  }

  const before = stored();
  if (before === "dark" || before === "light") root.dataset.theme = before;

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => button.setAttribute("aria-pressed", isDark());
    button.hidden = false;
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      stored(root.dataset.theme);
      show();
    });
    dark.addEventListener("change", show);
    show();
  });
})();
