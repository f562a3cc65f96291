"""The page of `grpo report`: one HTML file that opens offline. Its template, script and styles lie in page/.

render   the page, from what stages.inspect.report_data collects
figures  its figures, drawn as SVG
"""
