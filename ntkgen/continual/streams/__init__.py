"""Which samples are seen, under which labels and in which order: functions of labels, settings and a seed, no torch."""
