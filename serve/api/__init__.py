"""HTTP: what is asked, what is answered, who may ask, and how much. No torch, no ray."""
