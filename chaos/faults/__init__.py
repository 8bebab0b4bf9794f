"""Each file here is one fault, what it does to nodes and how that is undone, or what several faults are built on."""
