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
      mermaid.initialize({ startOnLoad: false, theme: dark ? "dark" : "neutral", fontFamily: "inherit" });
      mermaid.run({ nodes: diagrams });
    };
    show();
    new MutationObserver(show).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  };
  document.head.append(library);
});
