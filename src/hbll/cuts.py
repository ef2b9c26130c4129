"""The former place of hbll.Chain's parts."""

raise ImportError("hbll.cuts is now hbll.Chain (for SequentialNetwork) and hbll.cut")
