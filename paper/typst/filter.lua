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
