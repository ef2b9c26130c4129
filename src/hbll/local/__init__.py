"""Local rules on networks cut into blocks, behind one interface; by name in ``hbll.methods``.

network = SequentialNetwork(*modules)         # the last one gives the logits; or a TreeNetwork, or an nn.Sequential
rule = make_rule("bll", blocks=4).prepare(network, x)
step = rule(network, x, y)
step.loss.backward()                          # any torch optimizer then moves the parameters of network and rule
"""
