"""The search for a good rho: successive halving over paired runs."""
