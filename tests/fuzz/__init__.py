"""Models run in drawn ways under drawn sessions, against their own attention maps in float64.

python -m tests.fuzz --minutes 2 --seed 0
"""
