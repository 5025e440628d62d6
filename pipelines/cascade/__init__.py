"""Any size, stage by stage: the plan, positions and noise levels by size, and its run."""
