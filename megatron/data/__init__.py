"""From files of proteins to batches of packed rows: vocabulary, readers, indexed dataset, packing, masking, loading."""
