"""The page of `grpo report`: one HTML file that opens offline. Its template, script and styles are in page/.

render   the page, from the data of stages.inspect.report_data
figures  its figures, drawn as SVG
"""
