// Light, dark, or as the system is. Runs before the page is drawn, so that it does not flash.
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  let kept = null;
  try { kept = localStorage.getItem("theme"); } catch { /* storage is off */ }
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => {
      const label = `${dark() ? "Light" : "Dark"} theme`;
      button.setAttribute("aria-label", label);
      button.title = label;
    };
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      try { localStorage.setItem("theme", root.dataset.theme); } catch { /* storage is off */ }
      show();
    });
    system.addEventListener("change", show);
    show();
  });
})();
