"""What production does to a payment service, done to paygate on purpose: `python -m proofs.torture --help`.

`stage` sets up the real thing (a private PostgreSQL, two gunicorns on it, the sandbox as the provider, the merchant's
receiver); `people` are the clients, customers and operators and what they saw; `faults` breaks things by a seeded
schedule; `verdict` checks afterwards, from outside, that nothing was lost, doubled, stuck or wrong.
"""
