// Mermaid diagrams in the colours of the theme; the library is loaded where a page has one.
document.addEventListener("DOMContentLoaded", () => {
  const diagrams = [...document.querySelectorAll("pre.mermaid")];
  if (!diagrams.length) return;
  const texts = diagrams.map((diagram) => diagram.textContent);
  const here = document.querySelector("script[src*='diagrams.js']").src;
  const library = document.createElement("script");
  library.src = new URL("mermaid.js", here);
  library.onload = () => {
    const show = () => {
      const dark = document.documentElement.dataset.theme === "dark";
      diagrams.forEach((diagram, i) => {
        diagram.removeAttribute("data-processed");
        diagram.textContent = texts[i];
      });
      const colours = dark
        ? { primaryColor: "#29313d", primaryTextColor: "#e4e8ed", primaryBorderColor: "#3fb1c5", lineColor: "#9ca4af" }
        : { primaryColor: "#e8f4f6", primaryTextColor: "#222832", primaryBorderColor: "#0a7d91", lineColor: "#48566b" };
      mermaid.initialize({
        startOnLoad: false, theme: "base", fontFamily: "system-ui, sans-serif", themeVariables: { darkMode: dark, ...colours },
      });
      mermaid.run({ nodes: diagrams });
    };
    show();
    new MutationObserver(show).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  };
  document.head.append(library);
});
