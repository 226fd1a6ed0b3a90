// Before the first paint, so that a kept theme or language does not flash: the only script that is no module.
(() => {
  const root = document.documentElement;
  try {
    const theme = localStorage.getItem("kodalle.theme");
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    const language = localStorage.getItem("kodalle.language");
    if (language === "en") root.lang = "en";
  } catch {
    // Storage is closed to this page: the system's theme and Korean it is.
  }
})();
