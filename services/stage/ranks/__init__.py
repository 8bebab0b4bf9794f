"""The ranks of one stage: processes on one host that share its heads, its columns and its memory."""
