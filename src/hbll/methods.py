"""The former place of hbll.make_rule."""

raise ImportError("hbll.methods is now hbll.make_rule, with the table in hbll.rules")
