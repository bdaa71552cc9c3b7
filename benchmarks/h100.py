"""What the launchers would ask an H100, for the reports that are made without one."""

PROGRAMS = 132  # multiprocessors
L2_BYTES = 50 * 2**20
