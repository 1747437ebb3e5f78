"""A student as another program's files, read back and compared to the bit.

Each `to_X` has one `export_to_X(student, output, *, text_source, dtype)`. The student is on the
CPU, in float32; the output does not exist and appears only when written and compared; `text_source`
is the folder of tokenizer, template and generation files; `dtype` is of what is not packed, the
smallest that loses nothing when not given. It returns the keys of `export.json` and raises
ValueError where the format cannot hold the student or a tensor reads back otherwise.

Order: config, checks, model_folder, the `to_X`; gguf_family, gguf_keys, gguf_vocabulary,
gguf_sentencepiece, gguf_tensors, gguf_file, gguf_size; from_gguf (any program's file); plugin;
llama_cpp, runtimes, parity.
"""
