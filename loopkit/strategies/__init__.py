"""Where a task runs: devices, precision, loss scaling, clipping and state, behind one small
interface.
"""
