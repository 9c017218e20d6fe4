// Marks tables that are wider than the page.
const mark = () => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap")) {
    box.classList.toggle("scrolls", box.scrollWidth > box.clientWidth + 1);
  }
};
addEventListener("load", mark);
addEventListener("resize", mark);
