"use strict";
// Follows the run: asks the server whether it has a later page, and loads that with what was open on this one.
(function () {
  const POLL_MILLISECONDS = 2000;
  const line = document.getElementById("live");
  const said = line.textContent;
  const byId = (id) => document.getElementById(id);
  const CHOICES = { shade: "value", values: "checked", plain: "checked" };

  function keep() {
    const drawn = byId("browser").hidden ? [] : Object.entries(CHOICES); // a page without groups has chosen nothing
    const choices = drawn.map(([id, property]) => [id, byId(id)[property]]);
    const open = [...document.querySelectorAll("figure details[open]")].map((details) => details.closest("figure").id);
    history.replaceState({ choices, open, left: scrollX, top: scrollY }, "");
    history.scrollRestoration = "manual"; // else the browser scrolls once more, when the page has loaded
  }

  function restore(kept) {
    if (!kept) return;
    for (const [id, value] of kept.choices) {
      const [control, property] = [byId(id), CHOICES[id]];
      const drawn = control[property];
      control[property] = value;
      if (control[property] === value) control.dispatchEvent(new Event("change"));
      else control[property] = drawn; // the new page has no such choice
    }
    for (const details of document.querySelectorAll("figure details")) {
      details.open = kept.open.includes(details.closest("figure").id);
    }
    scrollTo(kept.left, kept.top);
    history.replaceState(null, "");
  }

  function tell(text) {
    if (line.textContent !== text) line.textContent = text; // else a screen reader would say it again and again
  }

  async function look() {
    try {
      const answer = await fetch("/state", { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      if ((await answer.text()) !== line.dataset.state) {
        keep();
        location.reload();
        return;
      }
      tell(said);
    } catch {
      tell(line.dataset.ended);
    }
    setTimeout(look, POLL_MILLISECONDS);
  }

  restore(history.state);
  addEventListener("load", () => { history.scrollRestoration = "auto"; });
  setTimeout(look, POLL_MILLISECONDS);
})();
