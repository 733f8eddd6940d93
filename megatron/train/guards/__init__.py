"""Steps that go wrong: how they are told, what is done about them, and faults made on purpose."""
