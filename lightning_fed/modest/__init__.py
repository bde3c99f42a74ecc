"""MoDeST's protocol, free of any transport: membership, one node's behaviour, and its simulation in virtual time."""
