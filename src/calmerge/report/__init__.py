"""Typed results, terminal tables, an offline page, a chart for a README, and the card of a merged model."""
