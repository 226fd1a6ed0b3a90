"""The HTTP API: routes, schemas, keys, rate limits, errors, streaming. No torch, no ray."""
