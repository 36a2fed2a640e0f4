// What a script makes nicer on the customer's pages; none of them needs it. News without loading the page anew, so that
// nothing jumps under a thumb or a screen reader; times as the reader's own clock shows them; a button to print.
//
// In the language of ES5 throughout: a browser that cannot parse the script has scripts all the same, so it would not
// load the page again by itself either.
(function () {
  "use strict";

  var FIRST_SECONDS = 0.5, LAST_SECONDS = 60;
  var main = document.querySelector("main");
  var state = document.getElementById("state");
  var said = state && state.innerHTML;
  var language = document.documentElement.lang.replace("en", "en-GB");

  function each(selector, change) {
    Array.prototype.forEach.call(document.querySelectorAll(selector), change);
  }

  function dress() {
    var shown = { day: "numeric", month: "long", year: "numeric", hour: "2-digit", minute: "2-digit", timeZoneName: "short" };
    each("time", function (time) {
      time.textContent = new Date(time.getAttribute("datetime")).toLocaleString(language, shown);
    });
    each("button[hidden]", function (button) {
      button.hidden = false;
      button.onclick = function () { window.print(); };
    });
  }

  function isLive() {
    return main.getAttribute("data-refresh") !== "";
  }

  function show(page) {
    var now = page.getElementById("state");
    if (!now || !state) return location.reload();
    if (now.innerHTML === said) return;
    said = now.innerHTML;
    if (document.getElementById("next").contains(document.activeElement)) state.focus(); // before its link is gone
    state.className = now.className;
    ["state", "next", "facts", "foot"].forEach(function (id) {
      document.getElementById(id).innerHTML = page.getElementById(id).innerHTML;
    });
    document.title = page.title;
    main.setAttribute("data-refresh", page.querySelector("main").getAttribute("data-refresh"));
    dress();
  }

  function look(seconds) {
    var request = new XMLHttpRequest();
    request.open("GET", location.href);
    request.responseType = "document";
    request.onload = function () { if (request.status === 200 && request.response) show(request.response); };
    request.onloadend = function () { if (isLive()) wait(seconds); }; // without network too
    request.send();
  }

  // The news mostly comes within a second of the customer: then the looks are close together, and ever rarer later.
  function wait(seconds) {
    function go() {
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", start);
      (document.hidden ? wait : look)(Math.min(seconds * 1.25, LAST_SECONDS));
    }
    function start() {
      seconds = FIRST_SECONDS;
      go();
    }
    var timer = setTimeout(go, seconds * 1000);
    document.addEventListener("visibilitychange", start);
  }

  dress();
  if (isLive() && state && state.className === "opening") {
    setTimeout(function () { location.reload(); }, main.getAttribute("data-refresh") * 1000);
  } else if (isLive()) {
    wait(FIRST_SECONDS);
  }
})();
