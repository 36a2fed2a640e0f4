// What a script makes nicer on the customer's pages; none of them needs it. News without loading the page anew, so that
// nothing jumps under a thumb or a screen reader; times as the reader's own clock shows them; a button to print.
"use strict";

const main = document.querySelector("main");
const parts = ["state", "next", "facts", "foot"];
let said = document.getElementById("state")?.innerHTML;

function dress() {
  const shown = { day: "numeric", month: "long", year: "numeric", hour: "2-digit", minute: "2-digit", timeZoneName: "short" };
  for (const time of document.querySelectorAll("time")) {
    time.textContent = new Date(time.dateTime).toLocaleString("en-GB", shown);
  }
  for (const button of document.querySelectorAll("button[hidden]")) {
    button.hidden = false;
    button.addEventListener("click", () => window.print());
  }
}

async function look() {
  const answer = await fetch(location.href, { cache: "no-store" });
  if (!answer.ok) return;
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const [now, then] = [page, document].map((each) => parts.map((id) => each.getElementById(id)));
  if (now.includes(null) || then.includes(null)) return location.reload();
  if (now[0].innerHTML === said) return;
  said = now[0].innerHTML;
  if (then[1].contains(document.activeElement)) then[0].focus(); // before the link that has it is gone
  then[0].className = now[0].className;
  then.forEach((part, index) => part.replaceChildren(...now[index].childNodes));
  document.title = page.title;
  main.dataset.refresh = page.querySelector("main").dataset.refresh;
  dress();
}

async function keepLooking(seconds) {
  await new Promise((wake) => {
    setTimeout(wake, seconds * 1000);
    document.addEventListener("visibilitychange", wake, { once: true });
  });
  if (!document.hidden) await look().catch(() => {}); // no network at the moment
  if (main.dataset.refresh) keepLooking(Math.min(seconds * 1.1, 60));
}

dress();
if (main.dataset.refresh && document.getElementById("state")?.className === "opening") setTimeout(() => location.reload(), main.dataset.refresh * 1000);
else if (main.dataset.refresh) keepLooking(3);
