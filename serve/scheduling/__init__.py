"""What the scheduler is made of: fair shares between keys and requests, and promises about the time. Plain Python."""
