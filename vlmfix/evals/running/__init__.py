"""How a run goes: batches, records, processes, resuming."""
