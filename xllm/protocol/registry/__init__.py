"""The registry: the little that must survive every process, behind one interface."""
