"""What paygate costs: against the least that such a service must do (`make bench`), and with years of payments behind
it (`make bench-growth`)."""
