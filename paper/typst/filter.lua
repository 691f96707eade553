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

-- A line of the list of origins: small, ragged, one below the other.
function Para(el)
  for _, part in ipairs(el.content) do
    if part.t == "Span" and part.identifier:match("^where%.") then
      local open = "#[#set text(size: 8.4pt); #set par(justify: false, first-line-indent: 0pt, hanging-indent: 1.5em)"
      return { pandoc.RawBlock("typst", open), el, pandoc.RawBlock("typst", "]") }
    end
  end
end
