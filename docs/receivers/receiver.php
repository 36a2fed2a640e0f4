<?php
// A receiver of paygate's notifications, to copy. It needs PHP 8 and no extension:
//
//     NOTIFY_SECRET=whsec_… php -S 127.0.0.1:9000 receiver.php

declare(strict_types=1);

const ORDERS = ['1001' => ['1250.00', 'NGN']]; // stands for your database: what each order costs

/** Whether paygate signed this body, less than five minutes ago. $body is raw: parsed JSON is another text. */
function verify(string $body, string $id, string $timestamp, string $signature, string $secret): bool
{
    if (!ctype_digit($timestamp) || abs(time() - (int) $timestamp) > 300) {
        return false;
    }
    $key = base64_decode(substr($secret, strlen('whsec_')));
    $made = base64_encode(hash_hmac('sha256', "$id.$timestamp.$body", $key, true));
    foreach (explode(' ', $signature) as $each) { // two of them, while one secret replaces another
        if (hash_equals("v1,$made", $each)) {
            return true;
        }
    }
    return false;
}

/** The same notification may come twice, and metadata is the word of whoever opened the payment. */
function handle(array $notification): string
{
    $payment = $notification['data']['payment'] ?? null;
    if ($notification['type'] !== 'payment.completed' || $payment === null) {
        return $notification['type'];
    }
    $number = (string) ($payment['metadata']['order'] ?? '');
    [$amount, $currency] = ORDERS[$number] ?? [null, null];
    if ($amount === null || number_format($payment['amount'], 2, '.', '') !== $amount || $payment['currency'] !== $currency) {
        return 'not what we sell: ' . $payment['id'];
    }
    // In your database: UPDATE orders SET paid = true WHERE number = … AND NOT paid. Deliver if it changed a row.
    $folder = getenv('DELIVERED') ?: 'delivered';
    @mkdir($folder);
    if (@fopen("$folder/$number", 'x') !== false) {
        return "deliver: $number";
    }
    if (!file_exists("$folder/$number")) {
        throw new RuntimeException("$folder cannot be written");
    }
    return "delivered before: $number";
}

$body = file_get_contents('php://input');
$id = $_SERVER['HTTP_WEBHOOK_ID'] ?? '';
$timestamp = $_SERVER['HTTP_WEBHOOK_TIMESTAMP'] ?? '';
$signature = $_SERVER['HTTP_WEBHOOK_SIGNATURE'] ?? '';
if (!verify($body, $id, $timestamp, $signature, (string) getenv('NOTIFY_SECRET'))) {
    http_response_code(401);
    echo "this was not signed by us, or is old\n";
    return;
}
error_log(handle(json_decode($body, true, 16, JSON_THROW_ON_ERROR)));
http_response_code(204); // any 2xx; anything else, or an exception, and it is sent again
