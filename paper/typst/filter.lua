-- What pandoc's LaTeX reader leaves for Typst to trip over.
local raw = function(s) return pandoc.RawInline("typst", s) end

-- A table's label arrives on a block around the table: move it to the table, or nothing can refer to it.
function Div(el)
  if #el.content == 1 and el.content[1].t == "Table" then
    el.content[1].identifier = el.identifier
    return el.content[1]
  end
end

-- \eqref{x} becomes a link with the label's name as its text: make it a reference.
function Link(el)
  if el.attributes["reference-type"] == "eqref" then return raw("#ref(<" .. el.attributes.reference .. ">)") end
end

-- Figures come at their true size.
function Image(el)
  el.attributes.width, el.attributes.height = nil, nil
  return el
end

-- Where the appendix begins (`\appendix`, as rcid.report.paper hands it on): letters instead of numbers, a new page.
local appendix = [[#place.flush()
#context [#metadata(here().page()) <body-ends>]
#pagebreak(weak: true)
#counter(heading).update(0)
#set heading(numbering: "A.1")]]

local function is_appendix(block) return block.t == "Div" and block.identifier == "appendix" end

-- The references come before the appendix, not behind it.
function Pandoc(doc)
  local body, references, at = {}, {}, nil
  for _, block in ipairs(doc.blocks) do
    local heading = block.t == "Header" and pandoc.utils.stringify(block) == "References"
    if heading or (block.t == "Div" and block.identifier == "refs") then references[#references + 1] = block
    else
      body[#body + 1] = block
      if is_appendix(block) then at = #body end
    end
  end
  if not at then return nil end
  local blocks = {}
  for i, block in ipairs(body) do
    if i == at then
      blocks[#blocks + 1] = pandoc.RawBlock("typst", "#[#set text(size: 8pt); #set par(leading: 0.45em, spacing: 0.5em)")
      for _, reference in ipairs(references) do blocks[#blocks + 1] = reference end
      blocks[#blocks + 1] = pandoc.RawBlock("typst", "]")
      blocks[#blocks + 1] = pandoc.RawBlock("typst", appendix)
    else blocks[#blocks + 1] = block end
  end
  return pandoc.Pandoc(blocks, doc.meta)
end

-- The list of origins: lines small and ragged, in two columns.
local open_list = [[#columns(2, gutter: 1.5em)[#set text(size: 7.4pt)
#show raw: set text(size: 6.4pt)
#set par(justify: false, first-line-indent: 0pt, hanging-indent: 1.5em, spacing: 0.45em)]]

local function is_origin(block)
  if block.t ~= "Para" then return false end
  for _, part in ipairs(block.content) do
    if part.t == "Span" and part.identifier:match("^where%.") then return true end
  end
  return false
end

function Blocks(blocks)
  local found, inside = {}, false
  for _, block in ipairs(blocks) do
    if is_origin(block) ~= inside then
      found[#found + 1] = pandoc.RawBlock("typst", inside and "]" or open_list)
      inside = not inside
    end
    found[#found + 1] = block
  end
  if inside then found[#found + 1] = pandoc.RawBlock("typst", "]") end
  return found
end
