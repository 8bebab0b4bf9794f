"""Tests of the scheduler and its parts."""
