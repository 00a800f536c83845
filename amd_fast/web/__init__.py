"""The web page of ``amd-fast serve``: enrol actions in the browser, recognise clips, see which modality was trusted and why."""
