// A receiver of paygate's notifications, to copy. It needs nothing but Node.js 18 or newer:
//
//     NOTIFY_SECRET=whsec_… PORT=9000 node receiver.mjs

import { createHmac, timingSafeEqual } from "node:crypto";
import { closeSync, mkdirSync, openSync } from "node:fs";
import { createServer } from "node:http";

const SECRET = process.env.NOTIFY_SECRET;
const LARGEST_BODY = 1024 * 1024;
const ORDERS = { 1001: { amount: 1250.0, currency: "NGN" } }; // stands for your database: what each order costs
const DELIVERED = process.env.DELIVERED ?? "delivered";

/** Whether paygate signed this body, less than five minutes ago. `body` is raw: parsed JSON is another text. */
function verify(body, id, timestamp, signature, secret) {
  if (!/^[0-9]+$/.test(timestamp) || Math.abs(Date.now() / 1000 - Number(timestamp)) > 300) return false;
  const key = Buffer.from(secret.slice("whsec_".length), "base64");
  const made = createHmac("sha256", key).update(`${id}.${timestamp}.`).update(body).digest();
  return signature.split(" ").some((each) => { // two of them, while one secret replaces another
    const [version, text = ""] = each.split(",");
    const given = Buffer.from(text, "base64");
    return version === "v1" && given.length === made.length && timingSafeEqual(given, made);
  });
}

/** The same notification may come twice, and `metadata` is the word of whoever opened the payment. */
function handle(notification) {
  const payment = notification.data.payment;
  if (notification.type !== "payment.completed" || !payment) return notification.type;
  const number = payment.metadata?.order;
  const order = Object.hasOwn(ORDERS, number) ? ORDERS[number] : undefined;
  if (order === undefined || payment.amount !== order.amount || payment.currency !== order.currency) {
    return `not what we sell: ${payment.id}`;
  }
  // In your database: UPDATE orders SET paid = true WHERE number = … AND NOT paid. Deliver if it changed a row.
  mkdirSync(DELIVERED, { recursive: true });
  try {
    closeSync(openSync(`${DELIVERED}/${number}`, "wx"));
  } catch (error) {
    if (error.code !== "EEXIST") throw error;
    return `delivered before: ${number}`;
  }
  return `deliver: ${number}`;
}

createServer(async (request, response) => {
  try {
    const chunks = [];
    let size = 0;
    for await (const chunk of request) {
      size += chunk.length;
      if (size <= LARGEST_BODY) chunks.push(chunk);
    }
    const body = Buffer.concat(chunks);
    const { "webhook-id": id = "", "webhook-timestamp": timestamp = "", "webhook-signature": signature = "" } = request.headers;
    if (!verify(body, id, timestamp, signature, SECRET)) {
      response.writeHead(401).end("this was not signed by us, or is old\n");
      return;
    }
    console.log(handle(JSON.parse(body)));
    response.writeHead(204).end(); // any 2xx; anything else, or no answer, and it is sent again
  } catch (error) {
    console.error(error);
    response.writeHead(500).end();
  }
}).listen(Number(process.env.PORT ?? 9000), "127.0.0.1");
