"""The demo model: what it is asked, how it is trained and how it is written down."""
