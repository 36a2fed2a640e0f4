"""What paygate costs, measured against the least that such a service must do: `make bench`."""
