"""The proxy that links go through: what it delays, holds, cuts short and damages."""
