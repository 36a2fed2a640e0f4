"""The currencies: their smallest amounts, what Paystack keeps of a payment, and how amounts read on a page."""

# Subunits: the smallest amount taken, and the fees of a local card: basis points, a flat part, the cap.
CURRENCIES = {
    "NGN": (5000, 150, 10000, 200000),
    "GHS": (10, 195, 0, None),
    "ZAR": (100, 290, 100, None),
    "KES": (300, 290, 0, None),
    "USD": (200, 390, 0, None),
    "XOF": (100, 320, 0, None),
}
FLAT_FEE_FROM = {"NGN": 250000}  # below this the flat part is waived


def fee(currency: str, amount: int) -> int:
    """What Paystack keeps of a payment, in subunits, rounded up."""
    _, points, flat, cap = CURRENCIES.get(currency, CURRENCIES["NGN"])
    if amount < FLAT_FEE_FROM.get(currency, 0):
        flat = 0
    kept = -(-amount * points // 10000) + flat
    return min(kept, cap) if cap is not None else kept


def with_fees(currency: str, amount: int) -> int:
    """What a customer who bears the fees pays, so that `amount` is left."""
    total = amount
    while total != amount + fee(currency, total):
        total = amount + fee(currency, total)
    return total


def money(currency: str, amount: int) -> str:
    return f"{currency}\N{NO-BREAK SPACE}{amount // 100:,}.{amount % 100:02}"
