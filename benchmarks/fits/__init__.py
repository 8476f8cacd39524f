"""What fits on a card, by the plan."""

CARDS = (24, 40, 80)  # GiB
SHARE = 0.9  # of a card that the plan may take; the driver, kernels' workspaces and the allocator's slack need the rest
MOST_APART = 0.15  # that the plan's ratio of one rank to two may be from the measured one
