"""What outlives the router: the journal of requests, and all else in its state folder."""
