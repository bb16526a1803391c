"""Model sources -> graphs: one file per source."""
