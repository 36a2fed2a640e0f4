// The desk: the owner's page on the back office's API. It shows what the API tells, and sends what the owner decides.
// Most words and all shapes stand in desk.html. The token is kept, and each refund that has no answer yet: in
// sessionStorage, which is this tab's alone.

const TICK_SECONDS = 5, IDLE_MINUTES = 30;

// Small tools

const $ = (id) => document.getElementById(id);
const BASE = $("desk").dataset.base;
const el = (tag, properties) => Object.assign(document.createElement(tag), properties);
const say = (text) => { if ($("said").textContent !== text) $("said").textContent = text; };
const wordOf = (kind, state) => $("words").content.querySelector(`[data-of="${kind} ${state}"]`).cloneNode(true);
const decimals = (amount, currency) => (currency === "XOF" && Number.isInteger(amount) ? 0 : 2);
const MINUTE = { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit" };

function money(amount, currency) {
  const digits = decimals(amount, currency);
  const shown = amount.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  return `${currency}\u00a0${shown}`;
}

/** How a value is written, by the `data-as` of its place. */
const WRITE = {
  money: (amount, { currency }) => money(amount, currency),
  figure: (amount, { currency }) => money(amount, currency).slice(4),
  time: (at) => el("time", { dateTime: at, textContent: new Date(at).toLocaleString("en-GB", MINUTE) }),
  payment: (_, payment) => wordOf("payment", stateOf(payment)),
  refund: (status) => wordOf("refund", status),
};

/** A copy of a template. Values go to their `data-is`, strings as text and never as HTML; a place without one goes. */
function copy(name, values) {
  const made = $(name).content.cloneNode(true);
  for (const place of made.querySelectorAll("[data-is]")) {
    const { is, as } = place.dataset, value = values[is], isThere = value || value === 0;
    if (isThere) place.replaceChildren(...[as ? WRITE[as](value, values) : value].flat());
    else (place.closest("dl > div") ?? place).remove();
  }
  for (const link of made.querySelectorAll("[data-to]")) link.href = values[link.dataset.to];
  return made;
}

/** A copy of a template with one button, and what the button does. */
function copyWithButton(name, values, onclick) {
  const made = copy(name, values);
  made.querySelector("button").onclick = onclick;
  return made;
}

const told = new WeakMap();

/** Fill a part of the page where what it tells has changed; whoever is in it stays at the same link or button. */
function fill(part, facts, make) {
  const text = JSON.stringify(facts), at = document.activeElement, wasIn = part.contains(at);
  if (told.get(part) === text) return;
  told.set(part, text);
  part.replaceChildren(...make());
  const isSame = (each) => each.href === at.href && each.dataset.do === at.dataset.do && !each.hidden;
  const heading = part.closest("section").querySelector("h2");
  if (wasIn) ([...part.querySelectorAll("a, button")].find(isSame) ?? heading).focus({ preventScroll: true });
}

const download = (name, blob) => el("a", { href: URL.createObjectURL(blob), download: name }).click();

// The token

let token = sessionStorage.getItem("desk.token");
const isIdle = () => Date.now() - sessionStorage.getItem("desk.seen") > IDLE_MINUTES * 60_000;

/** Somebody is there, unless it has been too long since: then it may be somebody else. */
function stir() {
  if (token && isIdle()) leave(`Nothing was done for ${IDLE_MINUTES} minutes, so the token was forgotten here.`);
  else sessionStorage.setItem("desk.seen", Date.now());
}

/** Forget the token, and all that is shown: the page begins anew, and says why. */
function leave(why) {
  sessionStorage.removeItem("desk.token");
  sessionStorage.setItem("desk.why", why);
  history.replaceState(null, "", location.pathname);
  location.reload();
}

async function enter() {
  const given = $("token").value.trim();
  if (!/^[!-~]+$/.test(given)) throw new Trouble("This is no token: it has letters, digits and signs, and no spaces.");
  await call("GET", "/payments?limit=1", null, { Authorization: `Bearer ${given}` });
  stir();
  sessionStorage.setItem("desk.token", (token = given));
  open();
}

// The API

/** What went wrong, in words that say what to do. `errors` are those of fields. Without a status no answer came. */
class Trouble extends Error {
  constructor(message, { status = 0, errors = {} } = {}) {
    Object.assign(super(message), { status, errors });
  }
}

/** The API's answer. Raises Trouble. */
async function call(method, path, body, headers = {}) {
  const sent = { Authorization: `Bearer ${token}`, ...(body && { "Content-Type": "application/json" }), ...headers };
  const how = { method, headers: sent, body: body && JSON.stringify(body), credentials: "omit" };
  const asked = fetch(`${BASE}/api/v1${path}`, { ...how, signal: AbortSignal.timeout(60_000) });
  const answer = await asked.catch(() => null), json = await answer?.json().catch(() => null);
  if (!json) throw new Trouble("No answer came. What you typed is still here: check your connection, then try again.");
  if (answer.ok) return json;
  if ([401, 403].includes(answer.status) && token) leave("The server no longer takes this token, so it was forgotten.");
  const messages = {
    401: "This is not the token. Look for ADMIN_TOKEN in the server’s settings.",
    403: "The server has no ADMIN_TOKEN: set one, and restart it.",
    429: `Too many tries. Wait ${answer.headers.get("Retry-After")} seconds, then try again.`,
  };
  throw new Trouble(messages[answer.status] ?? json.message, { status: answer.status, errors: json.errors });
}

// Forms and questions

/** Say at each field what is wrong with it, and the rest below; without trouble, nothing any more. */
function explain(form, { message = "", errors = {} } = {}) {
  const rest = { ...errors };
  for (const place of form.querySelectorAll(".problem")) {
    const field = $(place.id.replace("-problem", "")), texts = errors[field.name], label = field.labels[0].textContent;
    place.textContent = texts ? `${label}${/^[a-z]/.test(texts[0]) ? "" : ":"} ${texts.join("; ")}` : "";
    field.setAttribute("aria-invalid", Boolean(texts));
    delete rest[field.name];
  }
  form.querySelector(".trouble").textContent = [message, ...Object.values(rest).flat()].join(" ");
  form.querySelector("[aria-invalid=true]")?.focus();
}

/** `send` what was typed when the form is sent: never twice at once, and what goes wrong is said in the form. */
function handle(form, send) {
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (form.ariaBusy === "true") return; // a double click
    form.ariaBusy = "true";
    explain(form);
    try {
      const typed = [...new FormData(form)].map(([name, text]) => [name, text.trim()]);
      await send(Object.fromEntries(typed.filter(([, text]) => text)));
    } catch (trouble) {
      if (!(trouble instanceof Trouble)) throw trouble;
      explain(form, trouble);
    } finally {
      form.ariaBusy = "false";
    }
  };
}

/** Ask before something is sent. The dialog stays until there is an answer: words for it stand in the dialog. */
function ask(name, what, note, path, body = {}, send = (typed) => call("POST", path, { ...body, ...typed })) {
  const dialog = $(name), form = dialog.querySelector("form"), isBusy = () => form.ariaBusy === "true";
  form.reset();
  explain(form);
  $(`${name}-what`).textContent = what;
  $(`${name}-note`).textContent = note;
  form.querySelector(".back").onclick = () => { if (!isBusy()) dialog.close(); };
  dialog.oncancel = () => !isBusy(); // the Escape key; false keeps it open
  handle(form, async (typed) => {
    const { refund } = await send(typed);
    dialog.close();
    say(refund ? `Refund of ${sumOf(refund)}. ${wordOf("refund", refund.status).textContent}.` : dialog.dataset.done);
    await load("news");
  });
  dialog.showModal();
  return form.elements;
}

/** An amount as people type it: `1500`, `1,500.50`, `NGN 1,500`; NaN where it may mean two, as `1,50`. */
function numberOf(text) {
  const plain = text.trim().replace(/^(₦|₵|[a-z]{3})?\s*/i, "");
  return /^(\d{1,3}(,\d{3})+|\d{1,12})(\.\d{1,2})?$/.test(plain) ? Number(plain.replaceAll(",", "")) : NaN;
}

function amountOf(text = "") {
  if (numberOf(text)) return numberOf(text);
  throw new Trouble("Nothing was sent.", { errors: { amount: ["must be clear: write it like 1500 or 1,500.50"] } });
}

// Payments

let shown = [], after = null, search = 0;
const sumOf = ({ amount, currency }) => money(amount, currency);
const customer = (payment) => `${payment.customer_name}, ${payment.customer_email}`;
const stateOf = ({ status, cancelled_at: at }) =>
  at && ["pending", "failed", "expired"].includes(status) ? "cancelled" : status;

function sought(limit) {
  const { sought, status } = Object.fromEntries(new FormData($("find"))), text = sought.trim();
  const name = text.includes("@") ? "email" : /^PG-/i.test(text) ? "reference" : "order";
  const given = { limit, status, [name]: name === "reference" ? text.toUpperCase() : text };
  return new URLSearchParams(Object.entries(given).filter(([, value]) => value));
}

const orderOf = ({ metadata }) => metadata?.order && `Order ${metadata.order}`;
const rowOf = (payment) => copy("a-row", { ...payment, order: orderOf(payment), to: `#payment=${payment.id}` });

/** The list anew, one page `more`, or the `news` of what is shown. */
async function payments(_, how) {
  const mine = how ? search : ++search, isNews = how === "news" && shown.length > 0;
  const query = sought(isNews ? Math.min(Math.max(shown.length, 20), 100) : 20);
  if (how === "more") query.set("after", after);
  const { payments: found, next } = await call("GET", `/payments?${query}`);
  if (mine !== search) return; // something else is sought by now
  const before = new Map(shown.map((each) => [each.id, JSON.stringify(each)]));
  const last = isNews && next ? shown.findIndex(({ id }) => id === found.at(-1).id) : -1;
  const older = last < 0 ? [] : shown.slice(last + 1); // unless too much is new: then it is below "more"
  if (how !== "more") shown = [...found, ...older];
  else shown = [...shown, ...found.filter(({ id }) => !before.has(id))]; // a double click
  if (older.length === 0) after = next;
  fill($("list"), shown, () => shown.map(rowOf));
  if (how === "more") $("list").children[before.size]?.querySelector("a").focus();
  $("more").hidden = !after;
  $("none").hidden = shown.length > 0;
  $("none").textContent = query.size > 1 ? "No payment fits." : "No payments yet: make a link for the first.";
  const changed = isNews ? found.filter((each) => before.get(each.id) !== JSON.stringify(each)) : [];
  const toSay = (each) => `${sumOf(each)}, ${each.customer_name}: ${wordOf("payment", stateOf(each)).textContent}.`;
  if (changed.length) say(changed.map(toSay).join(" "));
}

// One payment

async function payment(id, how) {
  const path = `/payments/${encodeURIComponent(id)}`;
  if (!how) fill($("story"), id, () => [el("h2", { tabIndex: -1, textContent: "Payment" })]);
  const { payment: brief } = await call("GET", path);
  const paths = [`/payments?reference=${brief.reference}`, `${path}/refunds`, `${path}/events`];
  const [found, { refunds }, { events }] = await Promise.all(paths.map((each) => call("GET", each)));
  const [whole = brief] = found.payments;
  const story = events.filter(({ what }) => !what.endsWith("poll")); // these change without news
  if (way()[1] === id) fill($("story"), { whole, refunds, story }, () => [storyOf(whole, refunds, story)]);
}

/** The charges of a payment, with what can still be given back of each: of one that pays it at most the price. */
function chargesOf(payment, refunds, story) {
  return story.filter(({ what }) => what === "charge").map(({ facts: { reference, currency, ...facts } }) => {
    const isOwn = reference === payment.reference, amount = Number(facts.amount);
    const isPrice = isOwn && currency === payment.currency && payment.status !== "review";
    const most = isPrice ? Math.min(amount, payment.amount) : amount;
    const isBack = (each) => each.reference === reference && !["refused", "failed", "not_made"].includes(each.status);
    const back = refunds.filter(isBack).reduce((sum, each) => sum + each.amount, 0);
    return { reference, isOwn, currency, amount, left: Math.round((most - back) * 100) / 100 };
  });
}

function storyOf(payment, refunds, story) {
  const charges = chargesOf(payment, refunds, story), own = charges.find(({ isOwn }) => isOwn) ?? payment;
  const { order, ...others } = payment.metadata ?? {};
  const made = copy("a-payment", {
    ...payment, order, page: `${BASE}/pay/${payment.id}`,
    details: Object.entries(others).map(([name, value]) => `${name}: ${value}`).join("; "),
    came: sumOf(own) !== sumOf(payment) && sumOf(own),
    back: payment.refunded_amount > 0 && money(payment.refunded_amount, own.currency),
    seconds: charges.filter(({ isOwn, left }) => !isOwn && left > 0).map((charge) =>
      copyWithButton("a-second-charge", charge, () => refund(payment, charge))),
    refunds: refunds.map((each) => copy("a-refund", each)),
    story: story.map((each) => copy("an-event", each)),
  });
  for (const button of made.querySelectorAll("[data-when]")) {
    button.hidden = !button.dataset.when.split(" ").includes(own.left <= 0 ? "spent" : stateOf(payment));
    button.onclick = () => ACTIONS[button.dataset.do](payment, own);
  }
  return made;
}

const resolve = (decision) => (payment, charge) => {
  const currency = decision === "accept" && charge.currency !== payment.currency && { currency: charge.currency };
  const what = `${sumOf(charge)} from ${customer(payment)}.`, note = `The price is ${sumOf(payment)}.`;
  ask(decision, what, note, `/payments/${payment.id}/resolve`, { decision, ...currency });
};
const cancel = (payment) =>
  ask("cancel", `${sumOf(payment)}, asked of ${customer(payment)}.`, "", `/payments/${payment.id}/cancel`);
const ACTIONS = { refund, cancel, accept: resolve("accept"), reject: resolve("reject") };

/** One refund has one key, kept with what was sent until there is an answer: sent however often, it is made once. */
function refund(payment, { reference, isOwn, left, currency }) {
  const path = `/payments/${payment.id}/refunds`, place = `desk.refund.${reference}`;
  const newKey = () => ({ key: crypto.getRandomValues(new Uint32Array(4)).join("-") }); // without https too
  let kept = JSON.parse(sessionStorage.getItem(place)) ?? newKey();
  const keep = (now) => sessionStorage.setItem(place, JSON.stringify((kept = now)));
  const { amount, reason } = ask("refund", "", "", path, {}, async (typed) => {
    const body = { ...typed, amount: amountOf(typed.amount), ...(!isOwn && { reference }) };
    keep({ body, ...kept }); // what was sent before stays
    show();
    try {
      const answer = await call("POST", path, kept.body, { "Idempotency-Key": kept.key });
      sessionStorage.removeItem(place);
      return answer;
    } catch (trouble) {
      if ([400, 404, 413, 415, 422].includes(trouble.status)) keep(newKey()); // no, for good: the next one is another
      show();
      throw trouble;
    }
  });
  const show = () => {
    const typed = numberOf(amount.value), sum = typed ? money(typed, currency) : "…";
    amount.readOnly = reason.readOnly = Boolean(kept.body);
    $("refund-what").textContent = `${sum} to ${customer(payment)}.`;
    $("refund-note").textContent = kept.body
      ? "It was sent and has no answer yet. Send it again: it stays one refund."
      : `Left to refund: ${money(left, currency)}.`;
    amount.form.querySelector("button").textContent = `Refund ${sum}`;
  };
  keep(kept);
  amount.value = money(kept.body?.amount ?? left, currency).slice(4);
  reason.value = kept.body?.reason ?? "";
  amount.oninput = show;
  show();
}

// What waits for a decision

async function decide() {
  const [reviews, { incidents }] = await Promise.all(
    ["/payments?status=review&limit=100", "/incidents?limit=100"].map((path) => call("GET", path)));
  const ids = reviews.payments.map(({ id }) => id);
  const others = incidents.filter(({ kind, payment }) => kind !== "mismatch" || !ids.includes(payment));
  $("count").textContent = ids.length + others.length || "";
  $("undecided").hidden = ids.length + others.length > 0;
  fill($("reviews"), reviews.payments, () => reviews.payments.map(rowOf));
  fill($("incidents"), others, () => others.map(incidentOf));
}

function incidentOf(incident) {
  const { id, kind, payment, what_to_do: what } = incident;
  const name = kind[0].toUpperCase() + kind.slice(1).replaceAll("_", " ");
  const shown = { ...incident, name, see: payment && "See the payment", to: `#payment=${payment}` };
  return copyWithButton("an-incident", shown, () => ask("close", `${name}: ${what}`, "", `/incidents/${id}/close`));
}

// Links

async function makeLink({ amount, expires_in: seconds, ...typed }) {
  const body = { amount: amountOf(amount), qr: true, ...typed, ...(seconds && { expires_in: Number(seconds) }) };
  const { link } = await call("POST", "/links", body);
  const what = [link.description, link.order && `Order ${link.order}`].filter(Boolean).join(", ");
  $("made").replaceChildren(copy("a-link", { ...link, what }));
  $("url").value = link.url;
  draw($("qr"), link.qr_svg);
  $("copy").hidden = !navigator.clipboard; // a page that came without https has none
  $("copy").onclick = () => navigator.clipboard.writeText(link.url).then(() => say("The link is copied."));
  $("share").hidden = !navigator.share;
  $("share").onclick = () => navigator.share({ title: what, url: link.url }).catch(() => {}); // not now
  $("save").onclick = () => $("qr").toBlob((blob) => download(`payment-link-${link.order ?? link.amount}.png`, blob));
  $("print").onclick = () => window.print();
  $("made").querySelector("h3").focus();
}

/** The QR code, drawn from the one path of the API's: nothing else of it comes into the page. */
function draw(canvas, text) {
  const path = new DOMParser().parseFromString(text, "image/svg+xml").querySelector("path");
  const pen = canvas.getContext("2d");
  canvas.width = canvas.height = 2 * path.parentNode.getAttribute("width");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.setTransform(new DOMMatrix(path.getAttribute("transform")).scale(2));
  pen.stroke(new Path2D(path.getAttribute("d")));
}

function withdraw({ order }) {
  if (!order) throw new Trouble("", { errors: { order: ["is needed"] } });
  ask("withdraw", `Order ${order}.`, "A payment that is not paid yet is cancelled.", "/links/withdraw", { order });
}

// The report

const SUMS = ["gross", "fees", "refunds", "net"];
let reported = "";

/** The report of the chosen month. While it is awaited, no other month's is shown. */
async function report(_, how) {
  const month = $("month").value, since = `${month}-01`, end = new Date(since);
  if (how && reported === month) return;
  $("csv").disabled = $("figures").hidden = reported !== month;
  end.setUTCMonth(end.getUTCMonth() + 1);
  const { report: { rows } } = await call("GET", `/report?since=${since}&until=${end.toISOString().slice(0, 10)}`);
  if (month !== $("month").value) return; // another month is asked for by now
  reported = month;
  const days = new Date(end - 1).getUTCDate(), totals = rows.filter(({ by }) => by === "total");
  fill($("figures"), [since, rows], () => totals.map((total) => figures(total, rows, days)));
  $("figures").hidden = false;
  $("csv").disabled = rows.length === 0;
  $("csv").onclick = () => download(`payments-${month}.csv`, new Blob([csvOf(rows)], { type: "text/csv" }));
}

/** The sums of one currency, a bar for each of the month's days, and both again as tables. */
function figures(total, rows, days) {
  const of = (by) => rows.filter((row) => row.by === by && row.currency === total.currency);
  const [day, location] = [of("day"), of("location")], highest = Math.max(...day.map(({ gross }) => gross), 0.01);
  const lines = (each) => each.map((row) => copy("a-line", row));
  const facts = { ...total, unknown_fees: total.unknown_fees || null, days, highest };
  const made = copy("some-figures", { ...facts, day: lines(day), location: lines(location) });
  for (const table of made.querySelectorAll(".scroll")) table.ariaLabel += `, ${total.currency}`;
  const chart = made.querySelector("svg");
  chart.setAttribute("viewBox", `0 0 ${days} 100`);
  for (const { key, gross } of day) {
    const bar = document.createElementNS(chart.namespaceURI, "rect"), height = (100 * gross) / highest;
    const places = { x: key.slice(-2) - 0.9, y: 100 - height, width: 0.8, height };
    for (const name in places) bar.setAttribute(name, places[name]);
    chart.append(bar);
  }
  return made;
}

/** As `manage.py report --format csv`: what a spreadsheet would run is quoted. */
function csvOf(rows) {
  const names = ["by", "key", "currency", "payments", ...SUMS, "unknown_fees"];
  const key = (text) => `"${text.replace(/^[=+\-@\t\r\n＝＋－＠]/, "'$&").replaceAll('"', '""')}"`;
  const sums = (row) => SUMS.map((name) => [name, row[name].toFixed(decimals(row[name], row.currency))]);
  const written = rows.map((row) => ({ ...row, key: key(row.key), ...Object.fromEntries(sums(row)) }));
  return [names, ...written.map((row) => names.map((name) => row[name]))].join("\n") + "\n";
}

// The way from one view to another

const VIEWS = { payments, payment, decide, link: () => {}, report };
let isAway = false, loads = 0;

function way() {
  const [name, argument] = location.hash.slice(1).split("=");
  return name in VIEWS ? [name, argument] : ["payments"];
}

/** The view that is asked for, anew or as `how` says. What goes wrong is said, and tried again with the next news. */
async function load(how) {
  const [name, argument] = way();
  try {
    await VIEWS[name](argument, how);
    if (loads++ % 6 === 0) await decide();
    if (isAway) say("The connection is back.");
    isAway = false;
  } catch (trouble) {
    if (!(trouble instanceof Trouble)) throw trouble;
    isAway = !trouble.status;
    say(isAway ? "No connection. This page tries again by itself." : trouble.message);
  }
}

function go(event) {
  const [name] = way(), view = $(`view-${name}`), from = event && new URL(event.oldURL).hash;
  for (const each of Object.keys(VIEWS)) $(`view-${each}`).hidden = each !== name;
  // A payment is among the payments.
  for (const link of document.querySelectorAll("nav a")) link.ariaCurrent = link.hash.startsWith(`#${name}`) && "page";
  document.querySelector("dialog[open]")?.close(); // the question was of another view
  say("");
  load(name === "payments" && shown.length > 0 ? "news" : undefined);
  (view.querySelector(`.rows [href="${CSS.escape(from)}"]`) ?? view.querySelector("h2")).focus();
}

async function tick() {
  if (token && isIdle()) stir();
  else if (token && !document.hidden) await load("news").catch(console.error);
  setTimeout(tick, TICK_SECONDS * 1000);
}

function open() {
  $("enter").hidden = true;
  $("desk").hidden = false;
  window.onhashchange = go;
  go();
}

handle($("enter"), enter);
handle($("new-link"), makeLink);
handle($("take-back"), withdraw);
$("leave").onclick = () => leave("You have left. The token was forgotten here.");
$("find").onsubmit = () => { load(); return false; };
$("find").oninput = ({ target }) => { if (target.type === "radio" || !target.value) load(); };
$("more").onclick = () => load("more");
$("month").onchange = () => load();
for (let n = 0; n < 24; n++) {
  const at = new Date(Date.UTC(new Date().getFullYear(), new Date().getMonth() - n));
  const textContent = at.toLocaleString("en-GB", { month: "long", year: "numeric", timeZone: "UTC" });
  $("month").append(el("option", { value: at.toISOString().slice(0, 7), textContent }));
}
for (const event of ["pointerdown", "keydown", "visibilitychange"]) document.addEventListener(event, stir);

if (token && !isIdle()) open();
else if (token) stir(); // too late
else {
  $("enter").hidden = false;
  $("enter-why").textContent = sessionStorage.getItem("desk.why");
  sessionStorage.removeItem("desk.why");
  $("token").focus();
}
tick();
