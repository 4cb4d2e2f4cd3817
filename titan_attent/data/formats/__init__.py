"""Token files of other tools: each format is a module that recognises its files and says where their tokens are.

token_file.py    what a format says of a file: its dtype, where its tokens are, where its documents end
megatron.py      Megatron-core .bin with .idx
llmc.py          llm.c and modded-nanogpt .bin
numpy_file.py    real NumPy .npy
datatrove.py     datatrove .ds with .ds.index and .ds.loss
mds.py           MosaicML MDS; decompressed.py: its compressed shards
litdata.py       litdata chunks of tokens; json_index.py: the index.json of both
raw.py           bare tokens: nanoGPT, OLMo and Dolma, with .csv.gz
table.py         all of them, in the order in which a file is recognised

A new format is a module with these names and a line in the table. data/adopt/ makes a data set of the files.
"""
