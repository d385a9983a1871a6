// The page "Side by side": remembers the rung, and keeps the step in view where it is when another rung is chosen.
// The choice itself is CSS and works without this.
{
  const rungs = document.querySelector(".rungs");
  const kept = rungs.querySelector(`[value="${localStorage.getItem("rung")}"]`);
  if (kept) kept.checked = true;
  let shown = rungs.querySelector(":checked");

  rungs.addEventListener("change", ({ target }) => {
    const top = element => element.getBoundingClientRect().top;
    const edge = rungs.getBoundingClientRect().bottom;
    shown.checked = true;  // as it was, to see which step was in view
    const step = [...document.querySelectorAll(".step")].find(each => each.getBoundingClientRect().bottom > edge + 40);
    const before = Math.max(top(step), edge);
    target.checked = true;
    scrollBy({ top: top(step) - before, behavior: "instant" });
    shown = target;
    localStorage.setItem("rung", target.value);
  });
}
