// Marks tables that are wider than the page, and cells with sentences, which a phone shows wider.
const LONG = 40; // characters
const MARGIN = 16; // pixels beside a table, into which it may reach
const mark = () => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap")) {
    for (const cell of box.querySelectorAll("td")) {
      cell.classList.toggle("wordy", cell.textContent.length > LONG);
    }
    box.classList.toggle("scrolls", box.scrollWidth > box.clientWidth + MARGIN);
  }
};
addEventListener("load", mark);
addEventListener("resize", mark);
