"""Tests of a task: does it resume exactly, on any number of ranks, and after any fault?"""
